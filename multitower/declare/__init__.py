"""What a fusion is declared to be: plain data, no torch modules run."""
