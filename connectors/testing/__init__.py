"""What a store has to show, and servers to show it against; shipped, so that stores from elsewhere can be tested."""
