"""Operations with a fast version and the plain PyTorch reference that defines it."""
