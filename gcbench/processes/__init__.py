"""Child processes: started, asked, followed. Knows no command: a task names its handler."""
