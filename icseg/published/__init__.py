"""PatchICL as published (arXiv 2604.12752): dense features of whole images, patches of which attend to each other."""
