"""The software TDX module: migration leaves over guest memory, with real cryptography."""
