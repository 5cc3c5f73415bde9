package mux

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"testing"

	"github.com/hashicorp/yamux"
)

// writes records what reaches the connection.
type writes struct {
	net.Conn
	sizes []int
	err   error
}

func (w *writes) Write(p []byte) (int, error) {
	w.sizes = append(w.sizes, len(p))
	if w.err != nil {
		return 0, w.err
	}
	return w.Conn.Write(p)
}

// pair is a yamux session over a pipe whose client writes whole frames.
func pair(t *testing.T) (*writes, *yamux.Session, *yamux.Session) {
	t.Helper()
	a, b := net.Pipe()
	w := &writes{Conn: a}
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive, cfg.LogOutput = false, io.Discard
	client, err := yamux.Client(WholeFrames(w), cfg)
	if err != nil {
		t.Fatal(err)
	}
	server, err := yamux.Server(WholeFrames(b), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return w, client, server
}

// TestBytesArrive: bodies of every size arrive as they were written.
func TestBytesArrive(t *testing.T) {
	_, client, server := pair(t)
	s, err := client.Open()
	if err != nil {
		t.Fatal(err)
	}
	in, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, headerSize, headerSize + 1, maxCopied, maxCopied + 1, 600 << 10} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			sent := make([]byte, n) // as zeros they would look like headers of data
			for i := range sent {
				sent[i] = byte(i % headerSize)
			}
			go func() { _, _ = s.Write(sent) }()
			got := make([]byte, n)
			if _, err := io.ReadFull(in, got); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%v, equal %v", err, bytes.Equal(got, sent))
			}
		})
	}
}

func frame(typ byte, length byte) []byte {
	h := make([]byte, headerSize)
	h[1], h[headerSize-1] = typ, length
	return h
}

// TestWrites: a header waits for its body only, and for nothing if it has none.
func TestWrites(t *testing.T) {
	for name, test := range map[string]struct {
		writes [][]byte
		want   []int
	}{
		"data":          {[][]byte{frame(typeData, 12), make([]byte, 12)}, []int{24}},
		"window update": {[][]byte{frame(1, 12), frame(1, 7)}, []int{12, 12}},
		"fin":           {[][]byte{frame(typeData, 0), frame(typeData, 3), []byte("abc")}, []int{12, 15}},
		"large":         {[][]byte{frame(typeData, 1), make([]byte, maxCopied+1), frame(1, 0)}, []int{12, maxCopied + 1, 12}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			go func() { _, _ = io.Copy(io.Discard, b) }()
			w := &writes{Conn: a}
			f := WholeFrames(w)
			for _, p := range test.writes {
				if n, err := f.Write(p); n != len(p) || err != nil {
					t.Errorf("wrote %d of %d bytes: %v", n, len(p), err)
				}
			}
			if len(w.sizes) != len(test.want) {
				t.Fatalf("writes of %v bytes, want %v", w.sizes, test.want)
			}
			for i, n := range test.want {
				if w.sizes[i] != n {
					t.Errorf("writes of %v bytes, want %v", w.sizes, test.want)
				}
			}
		})
	}
}

func TestError(t *testing.T) {
	broken := errors.New("broken")
	for _, n := range []int{1, maxCopied + 1} {
		f := WholeFrames(&writes{err: broken})
		if _, err := f.Write(frame(typeData, 1)); err != nil {
			t.Error(err)
		}
		if _, err := f.Write(make([]byte, n)); !errors.Is(err, broken) {
			t.Errorf("body of %d bytes: %v", n, err)
		}
	}
}
