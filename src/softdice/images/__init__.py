"""files <-> arrays: images and masks, a module for each format family."""
