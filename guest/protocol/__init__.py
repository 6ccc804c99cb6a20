"""What launcher and agent must agree on: frames, job description, config drive. The host imports only this."""
