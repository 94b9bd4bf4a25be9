"""The offline demonstration behind `trak-ext demo`: real digits, real retraining, a picture."""
