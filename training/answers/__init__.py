"""The recipe of a small model that ranks and answers: qr-mini, taught to copy from the document that answers."""
