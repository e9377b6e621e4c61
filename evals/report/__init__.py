"""From the records of runs to a report: tables, files, plots, and one page that holds it all."""
