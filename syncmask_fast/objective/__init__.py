"""What is learned in a step: teacher, masks, negatives and losses."""
