"""What becomes of what the chunks give: results, files of finished chunks, and where it all came from."""
