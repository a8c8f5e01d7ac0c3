"""Renders a report: rows, sentences, tables, file formats, plots."""
