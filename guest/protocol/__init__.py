"""What launcher and agent must agree on: frames, job, config drive."""
