"""Row formats, one file a family. Each turns a parsed row into a `Sample`, and says which keys it needs."""
