"""Prompts: reading them, turning them into token ids, and deciding which rollout step uses which."""
