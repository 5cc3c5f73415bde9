package guestimage

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// Files that tell the agent what it may load; docs/guest-image.md has the
// formats.
const (
	bootList  = "etc/runv/modules"
	laterList = "etc/runv/modules.later"
	aliasList = "etc/runv/modules.alias"
)

// makeInitrd returns the initrd: the agent as /init, the modules, their lists
// and the directories on which the agent mounts.
func makeInitrd(agent []byte, mods moduleSet, compression string) ([]byte, error) {
	recs := []cpio.Record{
		// The kernel opens it for /init's standard streams before any devtmpfs.
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", string(agent), 0o755),
		cpio.StaticFile(bootList, bootText(mods), 0o644),
		cpio.StaticFile(laterList, laterText(mods), 0o644),
		cpio.StaticFile(aliasList, aliasText(mods), 0o644),
	}
	for _, d := range []string{"proc", "sys", "run", "tmp", "root"} {
		recs = append(recs, cpio.Directory(d, 0o755))
	}
	for _, m := range mods.files {
		recs = append(recs, cpio.StaticFile(m.path, string(m.data), 0o644))
		if len(m.sig) > 0 {
			recs = append(recs, cpio.StaticFile(m.path+signatureSuffix, string(m.sig), 0o644))
		}
	}
	recs = addParents(recs)
	slices.SortFunc(recs, func(a, b cpio.Record) int { return strings.Compare(a.Name, b.Name) })

	var buf bytes.Buffer
	out, err := compressor(&buf, compression)
	if err != nil {
		return nil, err
	}
	w := cpio.Newc.Writer(out)
	for i, r := range recs {
		r = cpio.MakeReproducible(r)
		// Distinct inodes: two files with one inode would be hard links.
		r.Ino = uint64(i) + 1
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("write initrd: %s: %w", r.Name, err)
		}
	}
	if err := errors.Join(cpio.WriteTrailer(w), out.Close()); err != nil {
		return nil, fmt.Errorf("write initrd: %w", err)
	}
	return buf.Bytes(), nil
}

// addParents adds the directories in which the records lie; they sort before
// their content.
func addParents(recs []cpio.Record) []cpio.Record {
	have := map[string]bool{}
	for _, r := range recs {
		have[r.Name] = true
	}
	for _, r := range recs {
		for i := strings.LastIndexByte(r.Name, '/'); i > 0; i = strings.LastIndexByte(r.Name[:i], '/') {
			if d := r.Name[:i]; !have[d] {
				have[d] = true
				recs = append(recs, cpio.Directory(d, 0o755))
			}
		}
	}
	return recs
}

// bootText: one path per line, in load order.
func bootText(s moduleSet) string {
	var b strings.Builder
	for _, m := range s.boot {
		b.WriteString(m.path + "\n")
	}
	return b.String()
}

// laterText: "name: path path…" per line, in load order, the last is the module.
func laterText(s moduleSet) string {
	var b strings.Builder
	for _, l := range s.later {
		b.WriteString(l[len(l)-1].name + ":")
		for _, m := range l {
			b.WriteString(" " + m.path)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// aliasText: "pattern name" per line, for the modules of laterText.
func aliasText(s moduleSet) string {
	var lines []string
	for _, l := range s.later {
		m := l[len(l)-1]
		for _, a := range m.alias {
			if !strings.ContainsAny(a, " \n") {
				lines = append(lines, a+" "+m.name+"\n")
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(slices.Compact(lines), "")
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// compressor wraps w. Its output depends on nothing but the input.
func compressor(w io.Writer, kind string) (io.WriteCloser, error) {
	switch kind {
	case "none":
		return nopCloser{w}, nil
	case "gzip":
		return gzip.NewWriter(w), nil
	case "zstd":
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	}
	return nil, fmt.Errorf("compression is %q, want none, gzip or zstd", kind)
}
