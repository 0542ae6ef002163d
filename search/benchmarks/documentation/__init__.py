"""Generated documentation: tables from results/, references from the code, the picture in README."""
