"""A user's data and its bytes. What lives here: encoding and decoding, codecs for typed data, the checks of
`debug=True`. What must not: when data is saved, or where.
"""
