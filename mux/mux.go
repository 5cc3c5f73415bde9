// Package mux has what both ends of the agent connection do below yamux, and with
// the streams of forwarded connections above it.
package mux

import (
	"encoding/binary"
	"io"
)

// The yamux header, see spec.md of github.com/hashicorp/yamux: version (1 byte),
// type (1), flags (2), stream id (4), length (4), big-endian.
const (
	headerSize = 12
	typeData   = 0
)

// maxCopied is up to which size a body is sent in one piece with its header: to
// copy more costs more than a second write.
const maxCopied = 32 << 10

// WholeFrames returns conn with yamux's header and body of a data frame, which
// yamux writes one after the other, in one write. Each write wakes the other
// side, which between a host and a guest is what a short message costs most.
//
// Nothing is kept back but a header that says that a body follows: yamux's next
// write is that body. Writes come from one goroutine, as yamux's do.
func WholeFrames(conn io.ReadWriteCloser) io.ReadWriteCloser {
	return &wholeFrames{ReadWriteCloser: conn}
}

type wholeFrames struct {
	io.ReadWriteCloser
	frame []byte // a header whose body has not come yet, or nothing; room for a body
}

func (w *wholeFrames) Write(p []byte) (int, error) {
	if len(w.frame) == 0 {
		if len(p) == headerSize && p[1] == typeData && binary.BigEndian.Uint32(p[8:]) > 0 {
			w.frame = append(w.frame, p...)
			return len(p), nil
		}
		return w.ReadWriteCloser.Write(p)
	}
	if len(p) > maxCopied {
		_, err := w.ReadWriteCloser.Write(w.frame)
		w.frame = w.frame[:0]
		if err != nil {
			return 0, err
		}
		return w.ReadWriteCloser.Write(p)
	}
	w.frame = append(w.frame, p...)
	n, err := w.ReadWriteCloser.Write(w.frame)
	w.frame = w.frame[:0]
	return max(0, n-headerSize), err
}
