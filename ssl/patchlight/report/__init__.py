"""What a run gives to people: log lines, the files of its folder, its page. Nothing here depends on how training works."""
