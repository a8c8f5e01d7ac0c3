"""From a report to what people and programs read: rows, sentences, tables, formats, plots."""
