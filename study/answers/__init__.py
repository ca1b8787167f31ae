"""The page of a study of experiments: each file answers one kind of question by tables and figures
of points."""
