"""What the student does: block-diffusion decoding, its record, and the states that are trained. Pure torch."""
