"""Other libraries: their trainers and their file formats; each module needs the extra that it names."""
