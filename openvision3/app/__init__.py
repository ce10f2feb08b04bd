"""The web page of `ov3 app`."""
