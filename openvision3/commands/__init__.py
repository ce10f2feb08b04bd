"""What each command of `ov3` does. Heavy modules are imported inside the functions, so that `ov3 --help` is fast."""
