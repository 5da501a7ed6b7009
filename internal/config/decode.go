package config

import (
	"encoding"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// field is the place of one key in a struct.
type field struct {
	key      string
	index    []int
	required bool
}

// fieldsOf lists the keys of a struct type and its label fields. Embedded
// structs without a tag lend their keys.
func fieldsOf(t reflect.Type) (keys []field, labels [][]int) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, tagged := f.Tag.Lookup("hcl")
		if !tagged && f.Anonymous && f.Type.Kind() == reflect.Struct {
			innerKeys, innerLabels := fieldsOf(f.Type)
			for _, inner := range innerKeys {
				inner.index = append([]int{i}, inner.index...)
				keys = append(keys, inner)
			}
			for _, inner := range innerLabels {
				labels = append(labels, append([]int{i}, inner...))
			}
			continue
		}
		key, option, _ := strings.Cut(tag, ",")
		switch {
		case option == "label":
			labels = append(labels, []int{i})
		case key != "" && key != "-":
			keys = append(keys, field{key: key, index: []int{i}, required: option == "required"})
		}
	}
	return keys, labels
}

// decoder walks a node and a value side by side.
type decoder struct{ found *faults }

func decodeRoot(found *faults, n Node, dst any) {
	v := reflect.ValueOf(dst)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		panic("config: dst must be a pointer to a struct") // a bug of the caller, not of the file
	}
	d := &decoder{found: found}
	d.structure(n.block, n, v.Elem())
}

// structure stores the items of a block in a struct.
func (d *decoder) structure(block string, n Node, v reflect.Value) {
	if n.kind != object {
		d.found.add(n.line, block, "must be a block, not %s", n.kind)
		return
	}
	keys, _ := fieldsOf(v.Type())
	known := make(map[string]field, len(keys))
	names := make([]string, 0, len(keys))
	for _, f := range keys {
		known[f.key] = f
		names = append(names, f.key)
	}
	occurrences := make(map[string][]item)
	var order []string
	for _, it := range n.items {
		if _, ok := known[it.key]; !ok {
			d.found.unknown(it.line, block, it.key, names)
			continue
		}
		if occurrences[it.key] == nil {
			order = append(order, it.key)
		}
		occurrences[it.key] = append(occurrences[it.key], it)
	}
	for _, key := range order {
		d.member(join(block, key), key, occurrences[key], v.FieldByIndex(known[key].index))
	}
	for _, f := range keys {
		if f.required && occurrences[f.key] == nil {
			d.found.add(n.line, block, "the key %q is missing", f.key)
		}
	}
}

// member stores everything that was written under one key of a block.
func (d *decoder) member(path, key string, items []item, v reflect.Value) {
	switch {
	case v.Kind() == reflect.Map:
		d.repeatedOnlyWithLabels(path, items)
		d.labelled(path, items, v)
		return
	case isBlockList(v.Type()):
		_, labels := fieldsOf(v.Type().Elem())
		if len(labels) > 0 {
			d.repeatedOnlyWithLabels(path, items)
		}
		seen := make(map[string]int)
		for _, it := range items {
			d.blocks(path, it.value, v, labels, nil, seen)
		}
		return
	}
	for _, again := range items[1:] {
		d.found.add(again.line, parent(path), "duplicate key %q; line %d has it too", key, items[0].line)
	}
	d.value(path, key, items[0].value, v)
}

// repeatedOnlyWithLabels refuses `plugins {} plugins {}` where the labels stand
// inside, but not `federates_with "a" {} federates_with "b" {}`.
func (d *decoder) repeatedOnlyWithLabels(path string, items []item) {
	for _, again := range items[1:] {
		if !again.labelled || !items[0].labelled {
			d.found.add(again.line, parent(path), "duplicate block %q; line %d has it too", last(path), items[0].line)
		}
	}
}

// labelled fills a map: one element for each label.
func (d *decoder) labelled(path string, items []item, v reflect.Value) {
	result := reflect.MakeMap(v.Type())
	seen := make(map[string]int)
	for _, it := range items {
		for _, block := range d.asBlocks(path, it.value) {
			for _, inner := range block.items {
				if line, dup := seen[inner.key]; dup {
					d.found.add(inner.line, path, "duplicate %s; line %d has it too", quote(inner.key), line)
					continue
				}
				seen[inner.key] = inner.line
				element := reflect.New(v.Type().Elem()).Elem()
				d.value(join(path, inner.key), inner.key, inner.value, element)
				result.SetMapIndex(reflect.ValueOf(inner.key).Convert(v.Type().Key()), element)
			}
		}
	}
	v.Set(result)
}

// blocks appends the blocks under n to the slice v. It goes down one level for
// each label that is left.
func (d *decoder) blocks(path string, n Node, v reflect.Value, labels [][]int, given []string, seen map[string]int) {
	for _, block := range d.asBlocks(path, n) {
		if len(given) < len(labels) {
			for _, inner := range block.items {
				d.blocks(join(path, inner.key), inner.value, v, labels, append(slices.Clip(given), inner.key), seen)
			}
			continue
		}
		if len(labels) > 0 {
			if line, dup := seen[strings.Join(given, "\x00")]; dup {
				d.found.add(block.line, path, "duplicate block; line %d has it too", line)
				continue
			}
			seen[strings.Join(given, "\x00")] = block.line
		}
		element := reflect.New(v.Type().Elem()).Elem()
		for i, label := range labels {
			element.FieldByIndex(label).SetString(given[i])
		}
		d.structure(path, block, element)
		v.Set(reflect.Append(v, element))
	}
}

// asBlocks returns n as one block, or, as JSON writes repeated blocks, a list
// of them.
func (d *decoder) asBlocks(path string, n Node) []Node {
	switch n.kind {
	case object:
		return []Node{n}
	case list:
		for _, element := range n.list {
			if element.kind != object {
				d.found.add(element.line, path, "must be a block, not %s", element.kind)
				return nil
			}
		}
		return n.list
	}
	d.found.add(n.line, path, "must be a block, not %s", n.kind)
	return nil
}

// value stores one node in one field.
func (d *decoder) value(path, key string, n Node, v reflect.Value) {
	if v.Type() == reflect.TypeFor[Node]() {
		n.block = path
		v.Set(reflect.ValueOf(n))
		return
	}
	if v.Kind() == reflect.Pointer {
		target := reflect.New(v.Type().Elem())
		d.value(path, key, n, target.Elem())
		v.Set(target)
		return
	}
	bad := func(format string, args ...any) {
		d.found.add(n.line, parent(path), key+" "+format, args...)
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if n.kind != str {
			if v.Type() == reflect.TypeFor[Duration]() {
				bad(`must be a duration with its unit in quotes, such as "1h30m", not %s`, n.kind)
				return
			}
			bad("must be a string, not %s", n.kind)
		} else if err := text.UnmarshalText([]byte(n.text)); err != nil {
			bad("is wrong: %v", err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.single(path, key, n, v)
	case reflect.Slice:
		d.elements(path, key, n, v)
	case reflect.String:
		if n.kind != str {
			bad("must be a string, not %s", n.kind)
			return
		}
		v.SetString(n.text)
	case reflect.Bool:
		if n.kind != boolean {
			bad("must be true or false without quotes, not %s", n.kind)
			return
		}
		v.SetBool(n.text == "true")
	case reflect.Float64:
		number, err := strconv.ParseFloat(n.text, 64)
		if (n.kind != integer && n.kind != float) || err != nil {
			bad("must be a number, not %s", n.kind)
			return
		}
		v.SetFloat(number)
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		d.number(n, v, bad)
	default:
		panic("config: a field of type " + v.Type().String() + " cannot be read from a file")
	}
}

// number reads a whole number that is not negative. It may stand in quotes, as
// bind_port does in the files that SPIRE ships.
func (d *decoder) number(n Node, v reflect.Value, bad func(string, ...any)) {
	if n.kind != integer && (n.kind != str || !digits(n.text)) {
		bad("must be a whole number, not %s", n.kind)
		return
	}
	if strings.HasPrefix(n.text, "-") {
		bad("must not be negative")
		return
	}
	largest := uint64(math.MaxUint64)
	if v.CanInt() {
		largest = math.MaxInt64
	}
	largest >>= 64 - v.Type().Bits()
	number, err := strconv.ParseUint(n.text, 10, 64)
	switch {
	case !digits(n.text):
		bad("must be written in decimal, without leading zeros")
	case err != nil || number > largest:
		bad("must be at most %d", largest)
	case v.CanInt():
		v.SetInt(int64(number))
	default:
		v.SetUint(number)
	}
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == "" && (s == "0" || s[0] != '0')
}

// single stores a block that may occur once.
func (d *decoder) single(path, key string, n Node, v reflect.Value) {
	blocks := d.asBlocks(path, n)
	if len(blocks) == 0 {
		return
	}
	for _, again := range blocks[1:] {
		d.found.add(again.line, parent(path), "duplicate block %q; line %d has it too", key, blocks[0].line)
	}
	d.structure(path, blocks[0], v)
}

// elements stores a list of values.
func (d *decoder) elements(path, key string, n Node, v reflect.Value) {
	if n.kind != list {
		d.found.add(n.line, parent(path), "%s must be a list such as [\"a\", \"b\"], not %s", key, n.kind)
		return
	}
	result := reflect.MakeSlice(v.Type(), 0, len(n.list))
	for i, element := range n.list {
		target := reflect.New(v.Type().Elem()).Elem()
		d.value(path, key+"["+strconv.Itoa(i)+"]", element, target)
		result = reflect.Append(result, target)
	}
	v.Set(result)
}

// isBlockList reports whether t is a slice of structs that are blocks.
func isBlockList(t reflect.Type) bool {
	if t.Kind() != reflect.Slice || t.Elem().Kind() != reflect.Struct || t.Elem() == reflect.TypeFor[Node]() {
		return false
	}
	return !reflect.PointerTo(t.Elem()).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

func join(block, key string) string {
	if len(key) > maxShown {
		key = key[:maxShown]
	}
	if block == "" {
		return key
	}
	return block + "." + key
}

func parent(path string) string {
	if at := strings.LastIndexByte(path, '.'); at >= 0 {
		return path[:at]
	}
	return ""
}

func last(path string) string { return path[strings.LastIndexByte(path, '.')+1:] }
