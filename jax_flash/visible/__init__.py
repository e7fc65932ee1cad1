"""What each query row sees: the forms of masks, and the operands of a call that they become."""
