"""What runs inside the virtual machine: PID 1, merge, payload. Standard library only on the boot path."""
