"""What `glmft doctor` looks at: each check is a function that returns findings and may raise; nothing here trains."""
