"""Parts of `lerobot-pi0 serve`: what requests may hold, and a server with the chunks of lerobot-rollout."""
