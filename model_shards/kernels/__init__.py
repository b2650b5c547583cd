"""Products for the CPU at hand, compiled when a rank starts: what torch and its libraries have no fast form of."""
