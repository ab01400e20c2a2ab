"""From files to batches: read rows, recognise their format, render and mask them in one pass, collate."""
