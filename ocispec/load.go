package ocispec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// MaxConfigSize bounds a config.json, in bytes. The largest that clients write
// (a seccomp profile and hundreds of mounts) stay below a tenth of it.
const MaxConfigSize = 16 << 20

// configName begins the errors of a file that is not a configuration at all.
const configName = "config.json"

// ErrTooLarge is returned for a document above MaxConfigSize.
var ErrTooLarge = errors.New(configName + ": is larger than 16 MiB")

// Load reads a config.json. Errors name the line and the column, and the field
// if a value has the wrong type. It does not validate; see Validate.
func Load(r io.Reader) (*specs.Spec, error) {
	var spec *specs.Spec
	if err := load(r, configName, &spec); err != nil {
		return nil, err
	}
	if spec == nil {
		return nil, errors.New(configName + ": is null, want an object")
	}
	return spec, nil
}

// LoadProcess reads a process document, as `exec --process` takes it. Errors are
// those of Load.
func LoadProcess(r io.Reader) (*specs.Process, error) {
	var p *specs.Process
	if err := load(r, "process", &p); err != nil {
		return nil, err
	}
	if p == nil {
		return nil, errors.New("process: is null, want an object")
	}
	return p, nil
}

// LoadResources reads a resources document, as `update --resources` takes it.
// Errors are those of Load.
func LoadResources(r io.Reader) (*specs.LinuxResources, error) {
	var res *specs.LinuxResources
	if err := load(r, "resources", &res); err != nil {
		return nil, err
	}
	if res == nil {
		return nil, errors.New("resources: is null, want an object")
	}
	return res, nil
}

func load(r io.Reader, name string, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, MaxConfigSize+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if len(data) > MaxConfigSize {
		return ErrTooLarge
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return fmt.Errorf("%s: is empty, want a JSON object", name)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return jsonError(data, name, err)
	}
	return nil
}

// jsonError says where in the document err happened, and for a value of the
// wrong type in which field.
func jsonError(data []byte, name string, err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		if syntax.Error() == "unexpected end of JSON input" {
			return fmt.Errorf("%s: line %d: the file ends in the middle of the JSON document", name, lineOf(data, int64(len(data))))
		}
		return fmt.Errorf("%s: line %d, column %d: %w", name, lineOf(data, syntax.Offset), columnOf(data, syntax.Offset), err)
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		field := fieldAt(data, typ.Offset)
		if field == "" {
			field = typ.Field
		}
		if field == "" {
			return fmt.Errorf("%s: is %s, want an object", name, describeValue(typ.Value))
		}
		want := "an object"
		if typ.Type != nil {
			want = describeType(typ.Type.String(), typ.Type.Kind().String())
		}
		return fmt.Errorf("%s: line %d: %s: is %s, want %s", name, lineOf(data, typ.Offset), field, describeValue(typ.Value), want)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// lineOf is the line, from 1, of the last byte before offset.
func lineOf(data []byte, offset int64) int {
	return bytes.Count(data[:clamp(offset, data)], []byte{'\n'}) + 1
}

// columnOf is the column, from 1 and in bytes, of the last byte before offset.
func columnOf(data []byte, offset int64) int {
	end := clamp(offset, data)
	return end - bytes.LastIndexByte(data[:end], '\n')
}

// clamp keeps offset-1 within data: a decoder's offset is behind the offending byte.
func clamp(offset int64, data []byte) int {
	return int(min(max(offset-1, 0), int64(len(data))))
}

func describeValue(v string) string {
	switch {
	case strings.HasPrefix(v, "number "):
		return "the " + v
	case v == "array" || v == "object":
		return "an " + v
	case v == "bool":
		return "a boolean"
	default:
		return "a " + v
	}
}

func describeType(name, kind string) string {
	switch kind {
	case "string":
		return "a string"
	case "bool":
		return "true or false"
	case "slice", "array":
		return "an array"
	case "struct", "map", "ptr", "interface":
		return "an object"
	case "uint", "uint16", "uint32", "uint64":
		return "a whole number of at least 0 (" + kind + ")"
	case "int", "int32", "int64":
		return "a whole number (" + kind + ")"
	default:
		return name
	}
}

// fieldAt returns the path, such as "mounts[2].options[0]", of the value that
// ends at or holds offset. It is used for error messages only, on a document
// whose syntax is known to be right.
func fieldAt(data []byte, offset int64) string {
	type level struct {
		array bool
		index int
		key   string
		isKey bool // the next string is a key
	}
	var stack []level
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	path := func() string {
		var b strings.Builder
		for _, l := range stack {
			if l.array {
				b.WriteString("[" + strconv.Itoa(l.index) + "]")
				continue
			}
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			if isIdentifier(l.key) {
				b.WriteString(l.key)
			} else {
				b.WriteString(strconv.Quote(clip(l.key)))
			}
		}
		return b.String()
	}
	// closed moves on to the next key or element after a value.
	closed := func() {
		if len(stack) == 0 {
			return
		}
		top := &stack[len(stack)-1]
		if top.array {
			top.index++
		} else {
			top.isKey = true
		}
	}
	for {
		tok, err := dec.Token()
		if err != nil {
			return ""
		}
		end := dec.InputOffset()
		switch t := tok.(type) {
		case json.Delim:
			switch t {
			case '{', '[':
				if end >= offset {
					return path()
				}
				stack = append(stack, level{array: t == '[', isKey: t == '{'})
			default:
				stack = stack[:len(stack)-1]
				closed()
			}
		case string:
			if top := len(stack) - 1; top >= 0 && stack[top].isKey {
				stack[top].key, stack[top].isKey = t, false
				continue
			}
			if end >= offset {
				return path()
			}
			closed()
		default:
			if end >= offset {
				return path()
			}
			closed()
		}
	}
}
