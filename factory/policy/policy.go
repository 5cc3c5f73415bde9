// Package policy is the policy of a VM factory: a list of the sizes of VMs that
// the factory has, and for each where its VMs come from. As text:
//
//	{"cache":4,"template":true,"cpu":1,"memory":512},{"template":true,"cpu":4,"memory":4096}
//
// It is not factory.Policy, which says what becomes of a VM that cannot be
// cloned. The package is text and numbers only: it imports nothing of runv, so
// that settings can be checked without what they are for.
package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The bounds of a policy.
const (
	// MaxText is the longest policy, in bytes.
	MaxText = 64 << 10
	// MaxEntries is how many sizes a policy has at most.
	MaxEntries = 64
	// MaxCache is how many VMs an entry keeps ready at most.
	MaxCache = 1024
	// MaxCPU is in virtual CPUs; MinMemory and MaxMemory are in MiB.
	MaxCPU    = 1024
	MinMemory = 64
	MaxMemory = 16 << 20
)

// None is the policy without an entry.
const None = "none"

// Config is an entry: one size of VMs. With neither a cache nor a template its
// VMs boot when they are asked for.
type Config struct {
	// Cache is how many VMs are kept ready, 0 to MaxCache.
	Cache int `json:"cache"`
	// Template: VMs are clones, else they boot.
	Template bool `json:"template"`
	// CPU is the number of virtual CPUs, 1 to MaxCPU.
	CPU int `json:"cpu"`
	// Memory is in MiB, MinMemory to MaxMemory.
	Memory int `json:"memory"`
}

// Name tells the sizes of one policy apart. It is fit for a file.
func (c Config) Name() string { return fmt.Sprintf("cpu%d-mem%d", c.CPU, c.Memory) }

// String is the entry as Parse reads it.
func (c Config) String() string {
	return fmt.Sprintf(`{"cache":%d,"template":%t,"cpu":%d,"memory":%d}`, c.Cache, c.Template, c.CPU, c.Memory)
}

// Fits tells whether a VM of this size serves a request.
func (c Config) Fits(cpu, memory int) bool { return c.CPU >= cpu && c.Memory >= memory }

// Validate reports the first field that is out of its range.
func (c Config) Validate() error {
	for _, f := range fields {
		if f.number == nil {
			continue
		}
		if n := *f.number(&c); n < f.least || n > f.most {
			return fmt.Errorf("%s is %d, want %d to %d", f.name, n, f.least, f.most)
		}
	}
	return nil
}

// Validate checks entries that were not made by Parse: their ranges, their
// number, and that no size is there twice.
func Validate(list []Config) error {
	if len(list) > MaxEntries {
		return fmt.Errorf("factory policy: %d entries, want at most %d", len(list), MaxEntries)
	}
	for i, c := range list {
		if err := c.Validate(); err != nil {
			return fmt.Errorf("factory policy: entry %d: %w", i+1, err)
		}
		if j := sameSize(list[:i], c); j >= 0 {
			return fmt.Errorf("factory policy: entry %d: %w", i+1, errTwice(c, j))
		}
	}
	return nil
}

func sameSize(list []Config, c Config) int {
	return slices.IndexFunc(list, func(o Config) bool { return o.CPU == c.CPU && o.Memory == c.Memory })
}

func errTwice(c Config, j int) error {
	return fmt.Errorf("entry %d has %d cpu and %d MiB already", j+1, c.CPU, c.Memory)
}

// Choose returns the index of the smallest entry that serves a request for cpu
// virtual CPUs and memory MiB: that with the least memory, and of those with as
// much the one with the fewest CPUs. It is -1 if all are too small.
func Choose(list []Config, cpu, memory int) int {
	best := -1
	for i, c := range list {
		if !c.Fits(cpu, memory) {
			continue
		}
		if best < 0 || cmp.Or(cmp.Compare(c.Memory, list[best].Memory), cmp.Compare(c.CPU, list[best].CPU)) < 0 {
			best = i
		}
	}
	return best
}

// Error is what is wrong with a policy's text, and where.
type Error struct {
	// Position counts characters from 1; it is one more than there are if
	// something is missing at the end.
	Position int
	// Near is the text from there on, shortened; empty at the end.
	Near string
	// What is wrong.
	What string
}

// Error is one line.
func (e *Error) Error() string {
	where := "at its end"
	if e.Near != "" {
		where = "near " + strconv.Quote(e.Near)
	}
	return fmt.Sprintf("factory policy: %s (character %d, %s)", e.What, e.Position, where)
}

// Parse reads a policy: one JSON object for each entry, with commas between
// them, with or without the brackets of an array; "none", or nothing at all, is
// the policy without an entry. "cpu" and "memory" must be there, "cache" is 0
// and "template" false unless told otherwise. The error is an *Error.
func Parse(s string) ([]Config, error) {
	p := &parser{text: s}
	list, err := p.policy()
	if err != nil {
		return nil, err
	}
	return list, nil
}

// field is a key of an entry.
type field struct {
	name        string
	number      func(*Config) *int  // nil: it is a truth value
	truth       func(*Config) *bool // nil: it is a number
	least, most int
	required    bool
}

// fields are the keys of an entry, in the order of String.
var fields = []field{
	{name: "cache", number: func(c *Config) *int { return &c.Cache }, most: MaxCache},
	{name: "template", truth: func(c *Config) *bool { return &c.Template }},
	{name: "cpu", number: func(c *Config) *int { return &c.CPU }, least: 1, most: MaxCPU, required: true},
	{name: "memory", number: func(c *Config) *int { return &c.Memory }, least: MinMemory, most: MaxMemory, required: true},
}

// blanks are JSON's.
const blanks = " \t\r\n"

// parser reads text from at on. encoding/json would take keys in other spelling
// and twice, and tells no position for a wrong one.
type parser struct {
	text string
	at   int // in bytes
}

func (p *parser) policy() ([]Config, error) {
	if len(p.text) > MaxText {
		p.at = MaxText
		return nil, p.errorAt(MaxText, fmt.Sprintf("it is longer than %d bytes", MaxText))
	}
	for i, r := range p.text {
		if r == utf8.RuneError && !strings.HasPrefix(p.text[i:], string(r)) {
			return nil, p.errorAt(i, "it is not valid UTF-8")
		}
	}
	if t := strings.Trim(p.text, blanks); t == "" || t == None {
		return nil, nil
	}
	array := p.take('[')
	if array && p.take(']') {
		return nil, p.end()
	}
	var list []Config
	for {
		p.space()
		begin := p.at
		c, err := p.entry()
		if err != nil {
			return nil, err
		}
		if j := sameSize(list, c); j >= 0 {
			return nil, p.errorAt(begin, errTwice(c, j).Error())
		}
		if len(list) == MaxEntries {
			return nil, p.errorAt(begin, fmt.Sprintf("more than %d entries", MaxEntries))
		}
		list = append(list, c)
		if !p.take(',') {
			break
		}
	}
	if array && !p.take(']') {
		return nil, p.wanted("a comma or a closing bracket")
	}
	return list, p.end()
}

// end wants nothing more.
func (p *parser) end() error {
	p.space()
	if p.at < len(p.text) {
		return p.errorAt(p.at, "there is more text than a policy")
	}
	return nil
}

func (p *parser) entry() (c Config, err error) {
	p.space()
	begin := p.at
	if !p.take('{') {
		return c, p.wanted(`an object such as {"template":true,"cpu":1,"memory":512}`)
	}
	seen := make([]bool, len(fields))
	for first := true; !p.take('}'); first = false {
		if !first && !p.take(',') {
			return c, p.wanted("a comma or a closing brace")
		}
		p.space()
		at := p.at
		key, err := p.key()
		if err != nil {
			return c, err
		}
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == key })
		if i < 0 {
			return c, p.errorAt(at, fmt.Sprintf("unknown key %q, want cache, template, cpu or memory", key))
		}
		if seen[i] {
			return c, p.errorAt(at, fmt.Sprintf("key %q is there twice", key))
		}
		seen[i] = true
		if !p.take(':') {
			return c, p.wanted("a colon")
		}
		f := fields[i]
		if f.truth != nil {
			*f.truth(&c), err = p.truth(f.name)
		} else {
			*f.number(&c), err = p.number(f.name, f.least, f.most)
		}
		if err != nil {
			return c, err
		}
	}
	for i, f := range fields {
		if f.required && !seen[i] {
			return c, p.errorAt(begin, fmt.Sprintf("the entry has no %q", f.name))
		}
	}
	return c, nil
}

// key reads a name in quotes. None that is known has an escape in it.
func (p *parser) key() (string, error) {
	if !p.take('"') {
		return "", p.wanted(`a key such as "cpu"`)
	}
	n := strings.IndexAny(p.text[p.at:], "\"\\\n")
	if n < 0 || p.text[p.at+n] != '"' {
		return "", p.wanted("a key and its closing quote")
	}
	key := p.text[p.at : p.at+n]
	p.at += n + 1
	return key, nil
}

func (p *parser) truth(name string) (bool, error) {
	switch at, w := p.word(); w {
	case "true", "false":
		return w == "true", nil
	default:
		return false, p.errorAt(at, name+" wants true or false")
	}
}

func (p *parser) number(name string, least, most int) (int, error) {
	at, w := p.word()
	n, err := strconv.Atoi(w)
	// As JSON has numbers: no plus sign, no zero in front.
	if whole := strconv.Itoa(n) == w; err == nil && !whole || errors.Is(err, strconv.ErrSyntax) {
		return 0, p.errorAt(at, name+" wants a whole number")
	}
	if err != nil || n < least || n > most {
		return 0, p.errorAt(at, fmt.Sprintf("%s is %s, want %d to %d", name, shorten(w), least, most))
	}
	return n, nil
}

// word reads what can be neither space nor punctuation, and tells where it began.
func (p *parser) word() (int, string) {
	p.space()
	at := p.at
	n := strings.IndexAny(p.text[at:], blanks+",:{}[]\"")
	if n < 0 {
		n = len(p.text) - at
	}
	p.at += n
	return at, p.text[at:p.at]
}

func (p *parser) space() {
	for p.at < len(p.text) && strings.IndexByte(blanks, p.text[p.at]) >= 0 {
		p.at++
	}
}

// take skips c, if it is the next.
func (p *parser) take(c byte) bool {
	p.space()
	if p.at < len(p.text) && p.text[p.at] == c {
		p.at++
		return true
	}
	return false
}

func (p *parser) wanted(what string) error {
	p.space()
	return p.errorAt(p.at, "want "+what)
}

func (p *parser) errorAt(at int, what string) error {
	return &Error{Position: utf8.RuneCountInString(p.text[:at]) + 1, Near: shorten(p.text[at:]), What: what}
}

// shorten keeps an error one line whatever was given.
func shorten(s string) string {
	const most = 24
	for i := range s {
		if i >= most {
			return s[:i] + "…"
		}
	}
	return s
}
