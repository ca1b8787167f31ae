"""Reporting: from results to tables, plots and one self-contained page."""
