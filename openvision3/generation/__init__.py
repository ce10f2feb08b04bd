"""Generation on unified tokens: flow matching with a wide-headed diffusion transformer (RAE, arXiv 2510.11690)."""
