"""The methods: each a loss with its state, none with a loop, an optimizer or a backbone."""
