"""What runs inside the virtual machine.  Standard library only on the boot path."""
