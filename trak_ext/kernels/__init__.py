"""What runs in compiled code: projection, the score pass, and how they are called."""
