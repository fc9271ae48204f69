"""What people see of a run: the console, the files of its folder, its page. It knows files and numbers, nothing of training."""
