"""USB/IP: the messages of its protocol, and the translation between them and usbredir packets. Sans-IO."""
