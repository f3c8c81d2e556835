"""What is to be done, in which bytes, and how long it takes."""
