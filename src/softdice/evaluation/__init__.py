"""What scoring and training share: names of labels, the table of scores by case and class, its means, and text."""
