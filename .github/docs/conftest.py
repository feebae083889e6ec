"""Pytest runs the code blocks of the pages; these files are Sphinx's."""

collect_ignore = ["conf.py", "site_extension.py"]
