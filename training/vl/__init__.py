"""The recipe of qr-mini-vl: a small vision-language model and the drawn world it learns from."""
