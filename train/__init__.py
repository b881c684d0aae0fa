"""Training and evaluation of students, and the demo world they are trained on."""
