"""Result records, and the tables made of them."""
