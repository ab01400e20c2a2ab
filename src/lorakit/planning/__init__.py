"""What a training will take, in bytes and seconds, worked out before anything is downloaded. No torch here."""
