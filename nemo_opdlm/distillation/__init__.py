"""What the student is taught: divergences, their targets, the normalisation of the loss, and curricula."""
