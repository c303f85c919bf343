"""The command line tool's verbs, one module each. Nothing here is imported by `import flashprefill`."""
