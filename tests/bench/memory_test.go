package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPSS(t *testing.T) {
	const rollup = `55d0c0a00000-7ffd3a5fe000 ---p 00000000 00:00 0                          [rollup]
Rss:                3456 kB
Pss:                1234 kB
Pss_Dirty:           200 kB
Pss_Anon:            100 kB
`
	for _, c := range []struct {
		name, text string
		want       int64
		bad        bool
	}{
		{"kernel's form", rollup, 1234 << 10, false},
		{"zero", "Pss:                   0 kB\n", 0, false},
		{"no line", "Rss: 3 kB\nPss_Anon: 3 kB\n", 0, true},
		{"empty", "", 0, true},
		{"no number", "Pss: many kB\n", 0, true},
		{"negative", "Pss: -1 kB\n", 0, true},
	} {
		got, err := pss(strings.NewReader(c.text))
		if got != c.want || err != nil != c.bad {
			t.Errorf("%s: %d, %v", c.name, got, err)
		}
	}
}

func TestParentOf(t *testing.T) {
	for _, c := range []struct {
		stat string
		want int
		bad  bool
	}{
		{"12 (sleep) S 7 12 12 0 -1", 7, false},
		{"12 (a) b (c) R 99 12", 99, false},
		{"12 sleep S 7", 0, true},
		{"12 (sleep) S", 0, true},
		{"12 (sleep) S x", 0, true},
	} {
		got, err := parentOf(c.stat)
		if got != c.want || err != nil != c.bad {
			t.Errorf("%q: %d, %v", c.stat, got, err)
		}
	}
}

func TestMentions(t *testing.T) {
	const dir = "/dev/shm/bench/1"
	for _, c := range []struct {
		args []string
		want bool
	}{
		{[]string{"runv", "supervise", dir + "/root", "id"}, true},
		{[]string{"runsc", "--root=" + dir}, true},
		{[]string{"qemu", "-fsdev", "local,id=share0,path=" + dir + "/root/id/share,multidevs=remap"}, true},
		{[]string{"runv", dir + "0/root"}, false},
		{[]string{"runv", "/elsewhere" + dir}, false},
		{[]string{"runv", dir + "0", dir}, true},
		{[]string{"runv", dir + "0," + dir + ",x"}, true},
		{nil, false},
	} {
		if got := mentions(c.args, dir); got != c.want {
			t.Errorf("%q: %v", c.args, got)
		}
	}
}

// A runv and a runsc beside each other, both started by process 100.
var tree = []process{
	{1, 0, []string{"init"}},
	{100, 1, []string{"bench", "--dir", "/b"}},
	{110, 100, []string{"runv", "supervise", "/b/0/root", "x-1"}},
	{111, 110, []string{"qemu-system-x86_64", "-name", "x"}},
	{112, 100, []string{"runv", "shim"}},
	{120, 100, []string{"runsc-gofer", "--root=/b/1/root"}},
	{121, 100, []string{"runsc-sandbox", "--root=/b/1/root"}},
	{122, 121, nil},
	{123, 122, []string{"stub"}},
	{130, 100, []string{"daemon"}},
	{900, 1, []string{"runv", "supervise", "/run/runv", "other"}},
	{901, 900, []string{"qemu-system-x86_64"}},
}

func TestBelonging(t *testing.T) {
	all := map[int]bool{110: true, 111: true, 112: true, 120: true, 121: true, 122: true, 123: true, 130: true}
	for _, c := range []struct {
		name          string
		dir           string
		inits, before map[int]bool
		want          []int
	}{
		{"supervisor, its child and the stand-in", "/b/0", map[int]bool{112: true}, all, []int{110, 111, 112}},
		{"sandbox, gofer and stubs of stubs", "/b/1", map[int]bool{121: true}, all, []int{120, 121, 122, 123}},
		{"what came while only this one had containers", "/b/0", map[int]bool{112: true}, map[int]bool{120: true, 121: true, 122: true, 123: true}, []int{110, 111, 112, 130}},
		{"nothing", "/b/2", nil, all, nil},
		{"a container's process alone", "/b/2", map[int]bool{122: true}, all, []int{122, 123}},
	} {
		got := slices.Sorted(maps.Keys(belonging(tree, 100, c.dir, c.inits, c.before)))
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestDescendants(t *testing.T) {
	got := slices.Sorted(maps.Keys(descendants(tree, 100)))
	if want := []int{110, 111, 112, 120, 121, 122, 123, 130}; !slices.Equal(got, want) {
		t.Errorf("%d, want %d", got, want)
	}
	// A process table is read piece by piece: it may show a loop.
	loop := []process{{2, 3, nil}, {3, 2, nil}}
	if got := closure(loop, 1, func(p process) bool { return p.pid == 2 }); len(got) != 2 {
		t.Errorf("loop: %v", got)
	}
}

func TestProcessTable(t *testing.T) {
	proc := t.TempDir()
	file := func(name, text string) {
		t.Helper()
		path := filepath.Join(proc, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file("7/stat", "7 (x y) S 1 7")
	file("7/cmdline", "prog\x00--flag\x00two words\x00")
	file("7/smaps_rollup", "Pss: 10 kB\n")
	file("8/stat", "8 (k) S 2 0")
	file("8/cmdline", "")
	file("8/smaps_rollup", "Pss: 5 kB\n")
	file("9/cmdline", "ended while we looked")
	file("self/stat", "not a number")
	got, err := processes(proc)
	if err != nil {
		t.Fatal(err)
	}
	want := "[{7 1 [prog --flag two words]} {8 2 []}]"
	if s := fmt.Sprint(got); s != want {
		t.Errorf("%s, want %s", s, want)
	}
	bytes, count, err := totalPSS(proc, map[int]bool{7: true, 8: true, 4711: true})
	if bytes != 15<<10 || count != 2 || err != nil {
		t.Errorf("%d bytes of %d processes, %v", bytes, count, err)
	}
	file("8/smaps_rollup", "nonsense\n")
	if _, _, err := totalPSS(proc, map[int]bool{8: true}); err == nil {
		t.Error("a file that cannot be understood was taken")
	}
}
