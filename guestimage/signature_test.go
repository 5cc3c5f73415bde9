package guestimage

import (
	"bytes"
	"testing"
)

func TestSplitSignature(t *testing.T) {
	module := []byte("module")
	signed := func(length byte, signature string) []byte {
		b := append(append([]byte{}, module...), signature...)
		b = append(b, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, length)
		return append(b, signatureMagic...)
	}
	for name, test := range map[string]struct {
		data []byte
		at   int
	}{
		"none":      {module, len(module)},
		"signed":    {signed(9, "signature"), len(module)},
		"too long":  {signed(200, "signature"), len(signed(200, "signature"))},
		"all of it": {signed(byte(len(module)+9), "signature"), len(signed(9, "signature"))},
		"only end":  {signatureMagic, len(signatureMagic)},
		"empty":     {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m, s := splitSignature(test.data)
			if !bytes.Equal(m, test.data[:test.at]) || !bytes.Equal(s, test.data[test.at:]) {
				t.Errorf("%d bytes and a signature of %d, want %d and %d", len(m), len(s), test.at, len(test.data)-test.at)
			}
		})
	}
}

func FuzzSplitSignature(f *testing.F) {
	f.Add([]byte("module~Module signature appended~\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, s := splitSignature(b)
		if !bytes.Equal(append(append([]byte{}, m...), s...), b) {
			t.Error("something is lost")
		}
	})
}
